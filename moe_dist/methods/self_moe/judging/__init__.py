"""Whether an answer is right, a program passes, and a text is new."""
