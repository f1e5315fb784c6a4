"""Why a module is wrong: hypotheses that are tried on the trusted one, until one explains it.

A hypothesis changes the trusted module in one way: another epsilon, a factor left out, weights in
another order. It is accepted only if the module so changed gives what the candidate gave, to the
noise floor. What nothing explains is not explained.
"""
