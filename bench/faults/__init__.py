"""Real models and planted faults: does a comparison notice what is wrong?"""
