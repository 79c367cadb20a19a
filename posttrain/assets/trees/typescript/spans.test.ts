import assert from "node:assert/strict";
import test from "node:test";
import { clamp, isEven, label, overlaps, rising, share, total } from "./spans.js";

test("clamp keeps to its limits", () => {
  assert.equal(clamp(5, 1, 9), 5);
  assert.equal(clamp(0, 1, 9), 1);
  assert.equal(clamp(12, 1, 9), 9);
});

test("spans overlap", () => {
  assert.ok(overlaps(1, 4, 4, 6));
  assert.equal(overlaps(1, 3, 4, 6), false);
});

test("total", () => {
  assert.equal(total([]), 0);
  assert.equal(total([3, 4, 5]), 12);
});

test("share", () => {
  assert.equal(share(1, 4), 25);
  assert.equal(share(3, 0), 0);
});

test("label", () => {
  const cases = [
    { percent: 100, name: "full" },
    { percent: 51, name: "most" },
    { percent: 50, name: "some" },
  ];
  for (const { percent, name } of cases) {
    assert.equal(label(percent), name);
  }
});

test("even numbers", () => {
  assert.ok(isEven(4));
  assert.ok(!isEven(7));
});

test("rising values", () => {
  assert.ok(rising([1, 2, 2, 5]));
  assert.ok(!rising([3, 1]));
});
