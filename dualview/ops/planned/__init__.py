"""The enhancement of live tokens alone, with its products arranged as a device does them fastest.

Which tokens live is exact and the same everywhere (`live`); how products are arranged changes cost alone (`products`).
"""
