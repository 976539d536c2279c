// Runs before the first paint, so that a chosen theme never flashes. Classic script on purpose:
// modules are deferred. The toggle itself is in theme.js.
(function () {
  try {
    const theme = localStorage.getItem("sterna.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is blocked: the system's theme it is.
  }
})();
