// Commands with their confirmation, and times in the reader's zone. Everything else is HTML from the server.
"use strict";
(() => {
  const csrf = document.querySelector("meta[name=csrf]")?.content || "";
  const toast = document.getElementById("toast");
  const dialog = document.getElementById("ask");
  let hiding = 0;

  function say(text, bad) {
    toast.textContent = text;
    toast.className = bad ? "shown bad" : "shown";
    clearTimeout(hiding);
    hiding = setTimeout(() => { toast.className = ""; }, 6000);
  }

  function ask(text) {
    document.getElementById("ask-text").textContent = text;
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((answer) => {
      dialog.addEventListener("close", () => answer(dialog.returnValue === "yes"), { once: true });
    });
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-send]");
    if (!button) return;
    const [method, address] = button.dataset.send.split(" ");
    if (button.dataset.ask && !(await ask(button.dataset.ask))) return;
    button.disabled = true;
    try {
      const headers = { "X-CSRF-Token": csrf };
      if (button.dataset.body) headers["Content-Type"] = "application/json";
      const response = await fetch(address, { method, headers, body: button.dataset.body });
      if (response.status === 401) { location.assign("/login"); return; }
      const answer = await response.json();
      if (response.ok) say(answer.done.join("; ") || "There was nothing to do.");
      else say(typeof answer.detail === "string" ? answer.detail : "That was not possible.", true);
    } catch {
      say("The server does not answer.", true);
    } finally {
      button.disabled = false;
      htmx.trigger(document.body, "refresh");
    }
  });

  const long = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
  const short = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  function localise(root) {
    for (const time of root.querySelectorAll("time[datetime]:not([title])")) {
      const at = new Date(time.dateTime);
      time.title = time.textContent;
      time.textContent = (at.toDateString() === new Date().toDateString() ? short : long).format(at);
    }
  }
  localise(document);
  document.addEventListener("htmx:load", (event) => localise(event.target.parentElement || document));
})();
