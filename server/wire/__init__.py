"""What goes over HTTP, as OpenAI's API defines it."""
