"use strict";
// Copy buttons. Pages opened from disk have no clipboard API in some browsers: then the older command, then a selection.
for (const button of document.querySelectorAll("button.copy")) {
  const command = button.parentElement.querySelector("code");
  const say = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = "Copy"; }, 2500);
  };
  const copySelected = () => {
    const selection = getSelection();
    selection.selectAllChildren(command);
    let copied = false;
    try { copied = document.execCommand("copy"); } catch { copied = false; }
    if (copied) { selection.removeAllRanges(); }
    say(copied ? "Copied" : "Selected");
  };
  button.setAttribute("aria-live", "polite");
  button.hidden = false;
  button.addEventListener("click", () => {
    if (navigator.clipboard) {
      navigator.clipboard.writeText(command.textContent).then(() => say("Copied"), copySelected);
    } else {
      copySelected();
    }
  });
}
