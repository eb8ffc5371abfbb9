"""What a person sees of a plan: a report for the terminal, a picture."""
