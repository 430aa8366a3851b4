"""Speculative decoding: a proposer guesses the next tokens of a request, the target verifies all of them in one step.

`Speculation` is what the executor talks to.  It asks a length rule how many tokens to guess for whom, a proposer to
guess them, and a verification rule which of the guesses stand.
"""
