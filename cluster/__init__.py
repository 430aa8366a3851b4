"""Shoal past one machine: engines that Ray Serve places, and API processes that speak with them over TCP."""
