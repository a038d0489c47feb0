"""`dsnet support`: which networks of timm and torchvision can be plugged into, and what is seen when they are.

`names.py` lists and builds them, `planning.py` plans every one, `subject.py`, `checks.py` and `examining.py` look
closely at one of each architecture, `report.py` writes the page, and `sweep.py` runs all of it.
"""
