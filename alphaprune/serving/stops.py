"""Text up to a stop sequence, in pieces."""


class Stops:
    """Passes text on piece by piece, except what may yet turn out to begin one of the stop sequences."""

    def __init__(self, sequences: tuple[str, ...]) -> None:
        self.sequences = sequences
        self.found = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that is certain after this piece; once `found`, that before the sequence, and nothing after it."""
        if not self.sequences or self.found:
            return "" if self.found else piece
        text = self._held + piece
        found = [(text.find(sequence) + len(sequence), text.find(sequence)) for sequence in self.sequences]
        if found := [(end, start) for end, start in found if start >= 0]:
            self.found = True
            return text[: min(found)[1]]  # of the one that is complete first, however the text is cut
        held = max(_overlap(text, sequence) for sequence in self.sequences)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back when the text ended."""
        held, self._held = ("" if self.found else self._held), ""
        return held


def _overlap(text: str, sequence: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `sequence`."""
    lengths = range(min(len(text), len(sequence) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(sequence[:length])), 0)
