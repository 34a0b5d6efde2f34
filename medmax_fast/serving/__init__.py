"""Many users of one engine: a queue in front of it, and the OpenAI protocol over HTTP."""
