"""Where a row goes: rows -> handlers -> templates -> tokens -> indexed files -> data set -> batch."""
