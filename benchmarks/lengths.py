"""How long is each row measured?"""

from __future__ import annotations

from benchmarks.form import Form

__all__ = ["LENGTHS"]

LENGTHS: dict[str, dict[str, Form]] = {
    "smoke": {
        "publish": Form(2, 0.1, 100),
        "publish16": Form(2, 0.1, 20),
        "transaction": Form(2, 0.1, 100),
        "transaction16": Form(2, 0.1, 20),
        "consume": Form(2, 0.3, 200),
        "latency": Form(2, 0.2, 5),
        "apply_async": Form(2, 0.1, 100),
        "worker": Form(1, 1.0, 250),
        "worker-results": Form(1, 1.0, 250),
        "atomic": Form(1, 1.0, 250),
        "atomic-write": Form(1, 1.0, 250),
        "get": Form(1, 0.3, 20),
        "group500": Form(1, 0.1, 1),
        "chord200": Form(1, 0.1, 1),
        "parts10000": Form(1, 10.0, 500),
        "cpu": Form(2, 0.1, 100),
    },
    "short": {
        "publish": Form(3, 0.6, 20_000, 30),
        "publish16": Form(3, 0.8, 5_000, 40),
        "transaction": Form(3, 0.6, 20_000, 15),
        "transaction16": Form(3, 0.8, 5_000, 25),
        "consume": Form(3, 1.0, 4_000, 35),
        "latency": Form(3, 1.0, 60, 30),
        "apply_async": Form(3, 0.6, 10_000, 22),
        "worker": Form(3, 2.5, 1_500, 70),
        "worker-results": Form(3, 2.5, 1_500, 70),
        "atomic": Form(3, 2.5, 1_500, 50),
        "atomic-write": Form(3, 2.5, 1_500, 50),
        "get": Form(3, 1.0, 300, 75),
        "group500": Form(3, 1.5, 4, 85),
        "chord200": Form(3, 1.0, 6, 45),
        "parts10000": Form(3, 20.0, 2_000, 50),
        "cpu": Form(3, 0.4, 5_000, 18),
    },
    "full": {
        "publish": Form(7, 1.5, 40_000, 105),
        "publish16": Form(5, 1.5, 5_000, 95),
        "transaction": Form(7, 1.5, 40_000, 45),
        "transaction16": Form(5, 1.5, 5_000, 50),
        "consume": Form(5, 1.5, 8_000, 110),
        "latency": Form(5, 2.5, 100, 100),
        "apply_async": Form(7, 1.2, 20_000, 75),
        "worker": Form(3, 6.0, 4_000, 180),
        "worker-results": Form(5, 5.0, 4_000, 180),
        "atomic": Form(5, 5.0, 4_000, 120),
        "atomic-write": Form(5, 5.0, 4_000, 120),
        "get": Form(5, 2.0, 1_000, 140),
        "group500": Form(5, 3.0, 10, 165),
        "chord200": Form(5, 2.0, 15, 105),
        "parts10000": Form(3, 60.0, 10_000, 150),
        "cpu": Form(5, 0.8, 10_000, 50),
    },
}
