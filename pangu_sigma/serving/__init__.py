"""A model over HTTP in OpenAI's format: one thread owns the engine, an event loop speaks to the clients."""
