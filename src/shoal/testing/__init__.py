"""For tests of programs that talk to Shoal: a real server process."""

from shoal.testing.server import ServerFailedError, ServerProcess

__all__ = ["ServerFailedError", "ServerProcess"]
