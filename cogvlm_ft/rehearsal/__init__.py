"""A user's photos through review, build, training, evaluation and report, with a tiny model.

photos.py      draws a few photos and builds a shard set of them
tiny_model.py  creates a random CogVLM that can learn them, and its tokenizer
training.py    trains it, in a process of its own, as a user would
verdict.py     judges the real run: the 17B model on 1, 2 and 4 nodes
"""
