"""Habits that people have around nn.Module, each a row that is run with a split module.

A group of habits is a file of rows; `registry` lists them, `case` is what a row is given, `launch`
runs rows in processes, and `table` writes what came of them.
"""
