"""The recipe of the bundled models: corpus, tokenizer, token arrays, training, export, evaluation, model card.

`python -m shoal.model.training run` walks the whole way.  Every step writes its output under a work directory and is
skipped when that output exists, so a run that was stopped goes on where it was.  Only this package trains; the
network here is plain torch, and knows nothing of the backends that later execute what it learnt.
"""
