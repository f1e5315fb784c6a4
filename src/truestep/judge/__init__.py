"""From numbers to verdicts: floors, tails, the rule, rows, comparisons, where it broke."""
