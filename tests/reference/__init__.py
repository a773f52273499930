"""What the package is compared with: a slow, obvious version of each operator, the comparisons, the boxes and maps.

The tests and the benchmarks use it. It uses neither of them.
"""
