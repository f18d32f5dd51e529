// What is wider than its box is scrolled by arrow keys, so Tab must stop there; what fits is no stop.
function stopAtScrollers() {
  for (const box of document.querySelectorAll(".bd-article table, .bd-article .math")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  stopAtScrollers();
  window.addEventListener("resize", stopAtScrollers);
  document.addEventListener("toggle", stopAtScrollers, true);
});
