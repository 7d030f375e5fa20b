// What scrolls sideways can be reached by keyboard; the search dialog has a name.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const block of document.querySelectorAll("pre > code, .md-typeset__scrollwrap, math[display=block]"))
    if (block.scrollWidth > block.clientWidth) { block.tabIndex = 0; if (!block.matches("math")) { block.setAttribute("role", "group"); block.setAttribute("aria-label", "scrolls sideways"); } }
});

// A slider over pictures that were drawn beforehand.
document$.subscribe(() => {
  for (const figure of document.querySelectorAll("figure.frames")) {
    const [picture, range, shown] = ["img", "input", "output"].map(n => figure.querySelector(n)), values = JSON.parse(figure.dataset.values);
    range.addEventListener("input", () => { picture.src = `${figure.dataset.prefix}${range.value}.webp`; shown.textContent = values[range.value]; });
    range.addEventListener("pointerenter", () => values.forEach((_, k) => new Image().src = `${figure.dataset.prefix}${k}.webp`), { once: true });
  }
});
