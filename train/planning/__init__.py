"""Planning: what a run will need and cost, before it starts, from its compiled step or from formulas."""
