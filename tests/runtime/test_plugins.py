"""The tests work with any pytest plugin installed: none of them reuses the name of a plugin's fixture."""

import ast
from pathlib import Path

import pytest

# from pytest-benchmark, pytest-mock, pytest-xdist, pytest-cov, pytest-asyncio, anyio, Faker and others
FIXTURES = set("""
    benchmark benchmark_weave mocker class_mocker module_mocker package_mocker session_mocker worker_id
    testrun_uid cov no_cover event_loop event_loop_policy unused_tcp_port unused_tcp_port_factory unused_udp_port
    anyio_backend faker client session settings db app page browser snapshot httpserver freezer testdir pytester
    subtests requests_mock
""".split())


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[1].rglob("*.py")), ids=lambda file: file.stem)
def test_no_name_of_a_plugin(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            fixture = any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)
            if fixture or node.name.startswith("test_"):
                assert not FIXTURES & {node.name, *(argument.arg for argument in node.args.args)}, node.name
