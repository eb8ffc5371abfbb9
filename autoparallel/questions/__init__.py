"""Questions about a finished plan: why it is so, why not otherwise, and in what two plans differ.

Here belongs what needs both the cost network, to plan anew with a choice forced, and the words of
the report. Finding a plan in the first place is planning's; what one plan takes is analysis'.
"""
