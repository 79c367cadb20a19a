"""The dashboard in a real browser: a run as it goes, hostile output, a phone, the keyboard, a wrong token."""

import json
import re
import time

import httpx
import pytest

from posttrain.recipe.load import find
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder
from posttrain.run.lock import holder
from tests.report.runs import FakeRun, evaluate, gate, phase
from tests.serve.serving import TOKEN

HOSTILE = (
    "<img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script><svg onload='window.hacked=1'>"
    '</pre></div>{{ 7 * 7 }}${window.hacked=1}`<a href="javascript:window.hacked=1" autofocus onfocus=window.hacked=1>'
)
LONG_STEPS = 20


def long_smoke(settings, name):
    """The smoke run, not begun, with a first training phase that lasts long enough to be watched."""
    found = find("smoke")
    recipe = found.build({flag.name: flag.default for flag in found.flags} | {"cases": 1})
    phases = tuple(
        one.model_copy(update={"steps": LONG_STEPS}) if one.name == "tool_sft" else one for one in recipe.phases
    )
    run = RunFolder.named(settings.runs_dir, name)
    recipe_file.save(recipe.model_copy(update={"phases": phases}), run.recipe)
    return run


def states(page):
    rows = page.locator("li[data-phase]")
    return {row.get_attribute("data-phase"): row.get_attribute("data-status") for row in rows.all()}


def dots(page):
    loss = page.locator("figure", has_text=re.compile("^loss"))
    return loss.locator("circle.raw").count() if loss.count() else 0


def wait_for(condition, seconds=300, what="it"):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def test_a_run_is_watched_stopped_resumed_and_read(served, open_browser):
    run = long_smoke(served.settings, "watched")
    page = open_browser()
    page.get_by_role("link", name="watched").click()
    page.get_by_role("button", name="Resume").click()
    # Phases advance, and the curve of the one at work grows.
    wait_for(lambda: states(page).get("data") == "complete", what="the first phase")
    wait_for(lambda: states(page).get("tool_sft") == "running", what="training")
    first = wait_for(lambda: dots(page), what="a curve")
    assert first < LONG_STEPS
    wait_for(lambda: dots(page) > first, what="a longer curve")
    # Stop: the step is finished and saved; the dashboard says so.
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_for(lambda: holder(run) is None, what="the end")
    page.locator(".stateline .status.stopped").wait_for()
    assert "running" not in states(page).values()
    page.get_by_role("button", name="Resume").click()
    wait_for(lambda: states(page).get("tool_sft") == "complete", what="the rest of the training")
    wait_for(lambda: states(page).get("export") == "complete", what="the whole run")
    page.locator(".stateline .status.finished").wait_for()
    events = [json.loads(line)["event"] for line in run.events.read_text().splitlines()]
    assert events.count("attempt_started") == 2 and "stopped" in events and "run_completed" in events
    steps = [json.loads(line)["step"] for line in run.phase("tool_sft").metrics.read_text().splitlines()]
    assert steps == list(range(1, LONG_STEPS + 1))
    # An episode, with its channels and the parts of its score.
    page.get_by_role("link", name="Episodes").click()
    row = json.loads(run.phase("grpo").samples.read_text().splitlines()[-1])
    page.locator(".opened article h3", has_text=row["task"]).wait_for()
    assert page.locator(".opened .parts").first.inner_text().startswith("score")
    for part in row["parts"]:
        assert part in page.locator(".opened .parts").first.inner_text()
    # What it was trained on: the targets in colour are the assistant's words, and nothing else is.
    page.get_by_role("link", name="Data", exact=True).click()
    page.locator("pre.tokens mark").first.wait_for()
    row = json.loads((run.phase("data").data / "tool_calls" / "rows.jsonl").read_text().splitlines()[0])
    marked = "".join(page.locator("pre.tokens mark").all_inner_texts())
    for message in row["conversation"]["messages"]:
        assert (message["content"] in marked) == (message["role"] == "assistant"), message
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 860})
    talk(page)
    page.get_by_role("link", name="Report").click()
    frame = page.frame_locator("iframe.report")
    frame.locator("h1", has_text="watched").wait_for()


def test_a_run_is_started_with_its_recipes_flags(served, open_browser):
    page = open_browser()
    page.get_by_role("button", name="New run").click()
    page.get_by_label("Name").fill("begun-here")
    page.get_by_label("cases", exact=True).fill("2")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url(re.compile("/dashboard/run/begun-here$"), timeout=60_000)
    page.get_by_role("button", name="Stop at once").click()
    page.locator(".q-dialog").get_by_role("button", name="Stop at once").click()
    run = RunFolder(served.settings.runs_dir / "begun-here")
    wait_for(lambda: holder(run) is None, what="the end")
    assert json.loads(run.recipe.read_text())["recipe"]["flags"] == {"seed": 0, "cases": 2}
    page.locator(".stateline .status.stopped").wait_for()


def talk(page):
    """With the run's model and its base beside it: both answer, at once, and a held-out task is scored."""
    page.get_by_role("link", name="Chat").click()
    page.get_by_label("Say something").fill("<b>Send</b> it, please.")
    page.get_by_label("Say something").press("Enter")
    sides = page.locator(".talk section")
    for number in (0, 1):
        assert sides.nth(number).locator(".kind-of-user pre").inner_text() == "<b>Send</b> it, please."
        wait_for(lambda n=number: sides.nth(n).locator(".message").count() > 1, what="an answer")
        wait_for(lambda n=number: sides.nth(n).get_by_role("status").count() == 0, what="the end of it")
    page.get_by_role("button", name="A held-out task").click()
    wait_for(lambda: sides.nth(0).locator(".message").count() > 1, what="an answer to the task")
    wait_for(lambda: page.locator(".talk").get_by_role("status").count() == 0, what="the end of it")


def hostile_run(settings):
    specs = [
        phase("grpo", "grpo", [gate(HOSTILE, "reward", ">", 0.5)], model="base", dataset="d"),
        evaluate("asked", "base"),
        evaluate("asked_again", "grpo"),
    ]
    made = FakeRun(settings.runs_dir / "hostile", specs, name=HOSTILE)
    made.complete("grpo", gates={HOSTILE: (0.1, False)})
    episode = {
        "step": 1, "place": 0, "task": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE, "score": 0.5,
        "parts": {HOSTILE: 1.0}, "reason": None, "ended": HOSTILE, "prompt_tokens": [1], "tokens": [2],
    }  # fmt: skip
    harmony = f"<|channel|>{HOSTILE}<|message|>{HOSTILE}<|end|><|start|>{HOSTILE}<|channel|>final<|message|>\ud800 done"
    made.append(made.run.phase("grpo").samples, [episode, episode | {"step": 2, "completion": harmony}])
    made.steps("grpo", [{"step": 1, "reward": 0.5}])
    for name in ("asked", "asked_again"):
        made.answers(name, [{"id": HOSTILE, "dataset": "tools", "prompt": HOSTILE, "completion": HOSTILE, "score": 0.0,
                             "parts": {}, "reason": HOSTILE, "category": HOSTILE}])  # fmt: skip
    made.write(made.run.logs / "attempt-0001.log", HOSTILE)
    return made.run


def test_what_a_model_wrote_is_never_markup(served, open_browser):
    hostile_run(served.settings)
    page = open_browser()
    for path in ("", "/episodes", "/episodes?phase=asked", "/report"):
        page.goto(served.page(f"/run/hostile{path}"))
        if "episodes" in path:
            page.locator(".opened article").wait_for()
            assert HOSTILE in page.locator(".opened").inner_text()
        else:
            page.locator("pre.log, iframe").first.wait_for()
        page.wait_for_timeout(300)
        for frame in page.frames:
            assert frame.evaluate("window.hacked") is None
            assert frame.locator("img[src=x], a[href^=javascript]").count() == 0
    page.goto(served.page("/run/hostile/episodes"))
    page.get_by_label("Beside it").click()
    page.get_by_role("option").nth(1).click()
    page.locator(".sides.two").wait_for()
    assert page.evaluate("window.hacked") is None


def test_a_wrong_token_leads_to_the_login_page(served, open_browser, heard):
    page = open_browser(token=None)
    answer = page.goto(served.page("/") + "?token=wrong")
    assert answer.status == 401 and page.get_by_label("Token").is_visible()
    assert served.settings.token not in page.content()
    page.get_by_label("Token").fill(served.settings.token)
    page.get_by_role("button", name="Open").click()
    page.get_by_role("heading", name="Runs").wait_for()
    assert "token" not in page.url
    # The browser itself complains of the 401 that was asked for, and of nothing else.
    assert len(heard.complaints) == 1 and "401" in heard.complaints.pop()


def registered(served):
    """Three traces, as the dataset duels@v1."""
    if served.settings.registry.all_keys():
        return
    build = {"dataset_name": "duels", "dataset_version": "v1", "limit": 3, "selection_strategy": "latest"}
    with httpx.Client(base_url=served.address, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        asked = {"count": 3, "seed": 1, "persist": True}
        client.post("/api/ungar/high-card-duel/generate", json=asked).raise_for_status()
        client.post("/api/datasets/build", json=build | {"filters": {}}).raise_for_status()


def test_a_dataset_is_read_row_by_row(served, open_browser):
    registered(served)
    page = open_browser()
    page.goto(served.page("/datasets"))
    page.get_by_role("link", name="duels@v1").click()
    page.locator(".lineage, .tree", has_text="3 rows from traces").wait_for()
    rows = [json.loads(line) for line in served.settings.registry.find("duels@v1").rows.read_text().splitlines()]
    page.locator("article h3", has_text=rows[0]["id"]).wait_for()
    page.get_by_role("button", name="Next").click()
    page.locator("article h3", has_text=rows[1]["id"]).wait_for()
    marked = page.locator("article mark").all_inner_texts()
    assert marked == [one["content"] for one in rows[1]["conversation"]["messages"] if one["role"] == "assistant"]
    page.locator("h1").click()
    for key, row in (("j", 3), ("j", 3), ("k", 2)):
        page.locator("body").press(key)
        page.wait_for_url(re.compile(f"row={row}$"))
        page.locator("article h3", has_text=rows[row - 1]["id"]).wait_for()
        assert page.get_by_label("Row").input_value() == str(row)


WAYS_TO_NOTHING = [
    ("/run/nosuch", "there is no run 'nosuch'"),
    ("/dataset/no@v1", "there is no dataset 'no@v1'"),
    ("/nowhere", "no such page"),
]


@pytest.mark.parametrize("path, says", WAYS_TO_NOTHING)
def test_what_is_not_there_is_told_on_a_page_that_leads_on(served, open_browser, heard, path, says):
    page = open_browser()
    assert page.goto(served.page(path)).status == 404
    assert says in page.get_by_role("alert").inner_text()
    page.get_by_role("link", name="Datasets").click()
    page.get_by_role("heading", name="Datasets").wait_for()
    # The browser itself complains of the 404 that was asked for, and of nothing else.
    assert len(heard.complaints) == 1 and "404" in heard.complaints.pop()


def test_a_name_that_is_none_is_refused_in_the_dialog(served, open_browser):
    page = open_browser()
    page.get_by_role("button", name="New run").click()
    page.get_by_text("Held-out").first.wait_for()
    page.get_by_label("Name").fill("Not A Name")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("run name 'Not A Name' is not allowed").wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_enabled()


@pytest.mark.parametrize("dark", [False, True])
def test_every_page_fits_a_phone(served, open_browser, dark):
    hostile_run(served.settings)
    registered(served)
    page = open_browser(width=390, height=844, dark=dark)
    for path in ("/", "/datasets", "/dataset/duels@v1", "/run/hostile", "/run/hostile/episodes", "/run/hostile/report"):
        page.goto(served.page(path))
        page.wait_for_timeout(1200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        cut = page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)"
        )
        assert cut == [], path
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark


def test_the_keyboard_is_enough(served, open_browser):
    hostile_run(served.settings)
    page = open_browser()
    page.goto(served.page("/run/hostile/episodes"))
    page.locator(".opened article").wait_for()
    assert "step 2" in page.locator(".opened h3").inner_text()
    page.locator("body").press("j")
    page.locator(".opened h3", has_text="step 1").wait_for()
    page.locator("body").press("k")
    page.locator(".opened h3", has_text="step 2").wait_for()
    page.goto(served.page("/"))
    link = page.get_by_role("link", name="hostile")
    link.wait_for()
    for _ in range(12):
        page.keyboard.press("Tab")
        if link.evaluate("one => one === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/run/hostile$"))
