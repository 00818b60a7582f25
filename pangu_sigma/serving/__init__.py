"""Serving: a model over HTTP in OpenAI's format. One thread owns the engine, an event loop talks to the clients."""
