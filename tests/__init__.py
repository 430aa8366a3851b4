"""The tests, a folder per room, and the fakes they share."""
