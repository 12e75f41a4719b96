"""Tasks, a folder each: __init__.py holds TASK (see common/tasks.py), prepare.py makes the data."""
