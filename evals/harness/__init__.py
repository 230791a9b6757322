"""Tasks of EleutherAI's lm-evaluation-harness, WMDP among them."""
