"""The whole path on an embedded data set: heads, loopback OpenNeuro, training, report.

Importing this package starts nothing and imports none of its modules. ``run.run_demo`` does the
work and reports events; ``live.render`` shows them on a console.
"""
