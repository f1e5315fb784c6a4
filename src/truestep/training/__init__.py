"""A training step: where is the trainer, or its backward, not the model that inference runs?"""
