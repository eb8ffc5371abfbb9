"""Threads: every dim of every value, followed through the dataflow from its birth to its end.

The loops of the rules connect dims of operands and results; what they connect is one thread.
factors.py keeps threads as factors of dims, find.py follows them, thread_names.py calls them by
what they are to the model, and threads_text.py prints them. What a plan makes of them, which thread
is split where and what must be synchronized for that, is in analysis/.
"""

from autoparallel.threads.all_threads import Threads
from autoparallel.threads.find import find_threads
from autoparallel.threads.thread import Birth, Passage, Place, Thread, Treatment

__all__ = ["Birth", "Passage", "Place", "Thread", "Threads", "Treatment", "find_threads"]
