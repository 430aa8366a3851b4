"""The engine process, and the API process's side of it."""
