"""Where a team keeps the content of its references: one URL, many kinds of servers."""
