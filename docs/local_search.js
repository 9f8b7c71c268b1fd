// Browsers start no worker from a file. A site that is opened from a folder searches in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.started = new Promise((resolve) => {
        this.frame.onload = () => {
          const { contentWindow, contentDocument } = this.frame;
          contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = contentDocument.createElement("script");
          script.onload = () => resolve(contentWindow);
          script.src = url;
          contentDocument.head.append(script);
        };
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      this.started.then((frame) => frame.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
