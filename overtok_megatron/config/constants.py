"""Numbers that several rooms agree on and that no user chooses."""

IGNORE_INDEX = -100  # a target that is not scored; what torch's cross entropy takes by default
