"""Speculative decoding: a proposer drafts the next tokens of a request, and the target verifies them in one step.

The executor talks to `Speculation`.  It asks a length rule how many tokens to draft for each request, a proposer to
draft them, and a verification rule which of them are accepted.
"""
