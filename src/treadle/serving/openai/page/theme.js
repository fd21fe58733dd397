// Light or dark: the system's choice until the button says otherwise. A classic script, so that it runs before the
// page is painted.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = localStorage.getItem("treadle-theme");
  if (chosen) root.dataset.theme = chosen;

  const current = () => root.dataset.theme ?? (system.matches ? "dark" : "light");

  function label(button) {
    const next = current() === "dark" ? "Light" : "Dark";
    button.textContent = next;
    button.setAttribute("aria-label", `${next} colours`);
    root.dispatchEvent(new Event("theme"));
  }

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    label(button);
    system.addEventListener("change", () => label(button));
    button.addEventListener("click", () => {
      root.dataset.theme = current() === "dark" ? "light" : "dark";
      localStorage.setItem("treadle-theme", root.dataset.theme);
      label(button);
    });
  });
})();
