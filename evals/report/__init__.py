"""From results to pages: tables, sentences, plots, leaderboards."""
