"""Problems with an answer that can be checked: sampled solutions, verdicts, pass@k."""
