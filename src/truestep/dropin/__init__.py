"""Other repositories' own checks by one changed import, with truestep's verdict beside theirs.

A module here has the names that a repository's tests import: written anew where truestep judges,
handed on from the repository itself where it does not. Signatures, files, results and exceptions
are theirs, and so is what passes; our verdict stands beside and decides nothing.
"""
