"""Files that other commands wrote → one page with pictures of all that they say: HTML that needs nothing else, PNGs."""
