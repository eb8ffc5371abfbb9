"""The figures of a finished plan: memory, time and communication, in numbers and in closed forms.

Here belong the count of memory by executing the plan's program abstractly, the timeline of a step,
estimates of pipelines, the list of collectives, and closed forms. All of them read a plan and
change nothing. The price of one op or collective is in `cost/`; what the planner chooses by is in
`strategy/`, with which nothing here shares code, so that each checks the other; texts and pictures
are in `view/`.
"""
