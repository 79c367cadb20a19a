// A fragment that is filled anew takes a focused link with it: the same link gets the focus back.
document.addEventListener("DOMContentLoaded", () => {
  let focused = null;
  document.addEventListener("focusin", (event) => { focused = event.target.closest("a[href]")?.getAttribute("href") ?? null; });
  document.addEventListener("pointerdown", () => { focused = null; });
  new MutationObserver(() => {
    if (focused === null || document.activeElement !== document.body) return;
    document.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }).observe(document.body, { childList: true, subtree: true });
});
