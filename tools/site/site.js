// What scrolls sideways can be reached by keyboard; the search dialog has a name.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const block of document.querySelectorAll("pre > code, .md-typeset__scrollwrap, math[display=block]"))
    if (block.scrollWidth > block.clientWidth) { block.tabIndex = 0; if (!block.matches("math")) { block.setAttribute("role", "group"); block.setAttribute("aria-label", "scrolls sideways"); } }
});
