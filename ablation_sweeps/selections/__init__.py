"""Selection rules, one file each: the order in which units are ablated."""
