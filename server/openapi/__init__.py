"""The OpenAPI document, made of the types that read requests and write answers."""
