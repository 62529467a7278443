"""Who may ask, what is written down, and what the server tells about itself."""

import hmac
import logging

import pytest
from api_server import inside, tiny

KEY = "secret-key-of-the-test"
ASK = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 2}
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/score"),
    ("POST", "/v1/score/evaluation"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing/there"),
    ("OPTIONS", "/v1/models"),
]


@pytest.fixture(scope="module")
def locked():
    with inside(tiny(), api_key=KEY, access_log=True) as server:
        yield server


def test_every_route_asks_for_the_key(locked, caplog, monkeypatch):
    compared, plain = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or plain(*both))
    caplog.set_level(logging.INFO)
    wrong = [None, "Bearer wrong", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \u00e9"]
    for method, path in ROUTES:
        for header in wrong:
            headers = {} if header is None else {"authorization": header.encode("utf-8")}
            answer = locked.ask(method, path, ASK if method == "POST" else None, headers=headers)
            assert answer.status_code == 401, (method, path, header)
            error = answer.json()["error"]
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
            assert KEY not in answer.text and answer.headers["www-authenticate"] == "Bearer"
    assert len(compared) == len(ROUTES) * (len(wrong) - 1) and KEY not in caplog.text


def test_with_the_key_every_route_answers(locked):
    for method, path in ROUTES[:9]:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = locked.ask(method, path, ASK if method == "POST" else None, headers=headers)
        assert answer.status_code in (200, 400, 405), (path, answer.text)
    assert locked.client(api_key=KEY).models.list().data


def test_the_environment_and_the_setting_both_give_a_key(monkeypatch):
    monkeypatch.setenv("API_KEY", KEY)
    with inside(tiny()) as server:
        assert server.post("/v1/chat/completions", ASK).status_code == 401


def test_neither_prompts_nor_answers_are_written_down_and_no_line_can_be_forged(locked, caplog):
    caplog.set_level(logging.DEBUG)
    marker = "the password is 12345"
    body = {**ASK, "messages": [{"role": "user", "content": marker}], "user": "eve\n127.0.0.1:1 GET /admin 200"}
    headers = {"authorization": f"Bearer {KEY}", "x-forwarded-for": "6.6.6.6\nforged"}
    assert locked.post("/v1/chat/completions", body, headers={"authorization": headers["authorization"]}).is_success
    locked.post(
        "/v1/chat/completions", {**body, "nonsense": marker}, headers={"authorization": headers["authorization"]}
    )
    locked.get("/v1/%0aforged%0d%1b[31m", headers={"authorization": headers["authorization"]})
    locked.get("/v1/models", headers={"authorization": headers["authorization"]})  # a line is written behind its answer
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("accessory")]
    assert ours and not any("6.6.6.6" in line for line in ours)
    assert not any(marker in line or "eve" in line or KEY in line for line in ours)
    assert all(line.isprintable() for line in ours) and any("%0Aforged%0D%1B" in line for line in ours)


def test_no_page_of_another_origin_may_ask_unless_it_is_named():
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with inside(tiny()) as server:
        answer = server.ask("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    with inside(tiny(), cors=["https://a.example"], api_key=KEY) as server:
        answer = server.ask("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert answer.is_success and answer.headers["access-control-allow-origin"] == "https://a.example"
        other = server.ask("OPTIONS", "/v1/chat/completions", headers={**preflight, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = server.post("/v1/chat/completions", ASK, headers={"origin": "https://a.example"})
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://a.example"


def test_documents_are_there_unless_they_are_switched_off():
    with inside(tiny()) as server:
        assert server.get("/docs").is_success
        told = server.get("/openapi.json").json()
        schema = told["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "messages" in told["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["properties"]
    with inside(tiny(), docs=False) as server:
        assert server.get("/docs").status_code == 404
        assert server.get("/openapi.json").status_code == 404


def test_metrics_count_requests_and_tokens_and_name_no_strange_path():
    with inside(tiny()) as server:
        told = server.post("/v1/chat/completions", ASK).json()
        list(server.client().chat.completions.create(**ASK, model="any", stream=True))
        server.get("/strange")
        text = server.get("/metrics").text
        assert f"accessory_engine_generated_tokens_total {2.0 * told['usage']['completion_tokens']}" in text
        assert 'accessory_http_requests_total{route="/v1/chat/completions",status="200"} 2.0' in text
        assert 'route="other",status="404"' in text and "strange" not in text
        assert "accessory_first_token_seconds_count 1.0" in text and "accessory_engine_alive 1.0" in text


def test_health_tells_what_is_under_way():
    with inside(tiny()) as server:
        assert server.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_the_model_is_called_as_its_setting_says(monkeypatch):
    monkeypatch.setenv("API_MODEL_NAME", "mine")
    with inside(tiny()) as server:
        assert server.client().models.list().data[0].id == "mine"
        assert server.post("/v1/chat/completions", ASK).json()["model"] == "mine"
