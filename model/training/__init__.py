"""The recipe of the bundled models: corpus, tokenizer, token arrays, training, export, evaluation, model card.

`python -m shoal.model.training run` runs all steps.  Every step writes its output under a work directory and is
skipped when that output exists, so a stopped run continues where it was.  Only this package trains.  Its network is
plain torch, independent of the backends that later execute the model.
"""
