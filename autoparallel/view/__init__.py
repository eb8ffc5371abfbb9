"""Everything that shows a finished plan: a report, pictures, traces, and graphs for other tools.

words.py has the words that all of them share, size_names.py and folded_rows.py make texts short;
report.py prints, dot.py draws, trace.py and exports.py write for other tools. Nothing is decided
or counted here: numbers come from the plan and from analysis/, and a plan that was read from JSON
looks as it did when it was made.
"""
