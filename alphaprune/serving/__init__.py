"""An OpenAI-compatible server: transformers' continuous batching, with limits that a server on a network needs.

requests, sampling, stops: what a client asked for; attention, engine: how it is generated; metrics, app, server: HTTP.
"""
